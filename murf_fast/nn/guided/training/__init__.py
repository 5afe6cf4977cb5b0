"""What AnyUp is trained with: crops, losses and augmentations."""
