"""tscnc_tf."""
__version__ = "0.1.0"
from tscnc_tf import regularizers
