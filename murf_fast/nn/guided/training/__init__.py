"""What upsamplers are trained with: AnyUp's crops, losses and augmentations, FeatUp's and FeatSharp's views."""
