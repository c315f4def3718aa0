"""What is on the board: buses, serial ports, power, hot plug."""

from kvmpass.board.board import Board, BoardEvents

__all__ = [
    "Board",
    "BoardEvents",
]
