"""How optimizers step, as rules: those that `optx.wrap` fuses. `register_base` adds a person's own."""

from optx.bases import adabelief as adabelief
from optx.bases import adafactor as adafactor
from optx.bases import adam as adam
from optx.bases import adam_kin as adam_kin
from optx.bases import adan as adan
from optx.bases import adaptive as adaptive
from optx.bases import asgd as asgd
from optx.bases import lamb as lamb
from optx.bases import lars as lars
from optx.bases import lion as lion
from optx.bases import muon as muon
from optx.bases import novograd as novograd
from optx.bases import rprop as rprop
from optx.bases import sgd as sgd
from optx.bases import yogi as yogi
