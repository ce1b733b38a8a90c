"""How optimizers step, as rules: those that `optx.wrap` fuses. `register_base` adds a person's own."""

from optx.bases import adam as adam
from optx.bases import lamb as lamb
from optx.bases import lars as lars
from optx.bases import sgd as sgd
