"""People's own images: a folder and pretrained weights become a fine-tuned model, or an answer to "is attention enough?".

images -> trunk -> runs -> finetune, compare, predict; deltas keep what a task adds to its trunk.
"""
