"""FeatSharp: features of an image and of its tiles, refined into one finer map."""
