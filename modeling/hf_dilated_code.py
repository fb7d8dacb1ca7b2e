"""The package that the code beside this file imports. Here it is installed; in a checkpoint this file carries it."""

import hf_dilated

__all__ = ["hf_dilated"]
