"""One loop for supervised training, fine-tuning and masked pre-training. Needs torch, numpy, timm, pyarrow, Pillow."""
