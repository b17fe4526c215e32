"""A race: the same reply decoded with heads and without, in two columns.

lanes.py      the two runs, each alone, and when each step was done
columns.py    both as rows, as they stood at a time
screen.py     the race on the screen
recording.py  the race as a picture or an asciinema cast
"""
