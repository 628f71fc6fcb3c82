"""The parts of sub-models, one idea a file; ``protocols.py`` says what each kind offers."""
