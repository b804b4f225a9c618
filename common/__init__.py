"""What the seven scripts of the chapter share."""

__version__ = "0.1.0"
