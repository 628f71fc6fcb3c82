"""What ``select`` lets its user choose from. Light, so that ``--help`` can list the choices."""

from typing import Literal

Mixing = Literal["uniform", "gap", "optimised"]
Strategy = Literal["greedy", "replacement", "beam", "exhaustive"]
Criterion = Literal["gain", "gain-per-byte"]
