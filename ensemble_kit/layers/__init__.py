"""The parts of sub-models: one idea a file. Imports torch, and nothing of the kit but itself.

Two kinds of pooling. A *set pooling* has ``describe`` (per frame, once) and ``aggregate`` (per
weighting of the frames); its output is the same for every order of the frames. A *sequence
pooling* reads the frames in order, up to each video's length. A part with ``loops_over_repeats``
has a graph for one number of repeats only.
"""
