"""vitlib: the parts behind the notebooks on "Three things everyone should know about Vision Transformers".

Rooms, and the direction of imports: `model` and `data` know nothing of the rest, `train` uses both. `errors`, `draws` and
`files` are the floor that every room stands on. What re-runs and judges the paper is another package, `lab`.
"""

__version__ = "0.1.0"
