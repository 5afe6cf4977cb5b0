"""Upsamplers of feature maps that an image guides: joint bilateral, AnyUp, NAF, JAFAR, Upsample Anything."""
