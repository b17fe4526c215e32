"""Tables, bars and charts of the sub-commands, and the chat's own tables.

tables.py        the chat's `/stats`, `/heads`, `/set` and `/help`
progress.py      a progress bar on standard error
checks.py        results of verify
accuracy.py      accuracy of the heads, for calibrate
models.py        the list of models
findings.py      findings of doctor
training.py      the live view of a training run
bench.py         replies of bench: by mode, category and turn
bench_steps.py   steps of bench: cost, bandwidth, parts, memory
bench_view.py    the chat's view on an unseen screen, to be timed
charts.py        figure of calibrate, and the look of all figures
bench_charts.py  figures of bench
"""
