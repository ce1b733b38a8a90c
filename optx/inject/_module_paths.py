"""Module paths without what wrappers put into them: see `optx._module_paths`, which all rooms use."""

from optx._module_paths import Paths as Paths
from optx._module_paths import bare_path as bare_path
from optx._module_paths import paths_of as paths_of
