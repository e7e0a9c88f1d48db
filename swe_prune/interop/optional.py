"""Import of optional packages for pretrained models when they are used."""

import functools

from swe_prune.runtime import packages

require = functools.partial(packages.require, extra="pretrained")
"""`runtime.packages.require` of the extra that installs all of these packages."""
