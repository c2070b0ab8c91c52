"""What the notebooks show: frames of numbers and how they are printed, figures, the page of a notebook, rendering.

answer   the committed verdicts                  figures   one function each; `regrouped` has notebook 61's
tables   of runs and verdicts, and `printed`     notebook  `open_page` and what a page shows
counted  of what is counted or timed             render    notebooks run with papermill
paper    the paper's own numbers
"""
