"""The version of medusa-chat, read by the build too."""

__version__ = "0.1.0"
