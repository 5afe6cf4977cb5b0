"""The main job on one photo: encode at several resolutions, fuse, compare with plain PyTorch, draw."""
