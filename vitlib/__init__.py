"""vitlib: the parts behind the notebooks on "Three things everyone should know about Vision Transformers".

Rooms, and the direction of imports: `model` and `data` know nothing of the rest, `train` uses both,
`lab` uses `train`. `errors`, `draws` and `paths` are the floor that every room stands on.
"""

__version__ = "0.1.0"
