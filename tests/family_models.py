"""Small random models of transformers' families, as ``optx bench families`` makes them."""

from optx.recipes._family_models import BY_LABEL as BY_LABEL
from optx.recipes._family_models import FAMILIES as FAMILIES
from optx.recipes._family_models import Family as Family
from optx.recipes._family_models import main_output as main_output
from optx.recipes._family_models import tokens as tokens
