"""Functions that change nothing: they tell what training is doing to a model."""

from optx.analysis._report_page import Report as Report
from optx.analysis.attention.margins import AttentionMargins as AttentionMargins
from optx.analysis.attention.margins import attention_margins as attention_margins
from optx.analysis.attention.svm import AttentionSVM as AttentionSVM
from optx.analysis.attention.svm import attention_svm as attention_svm
from optx.analysis.attention.svm import corr as corr
from optx.analysis.bounds.lipschitz import LipschitzBound as LipschitzBound
from optx.analysis.bounds.lipschitz import lipschitz as lipschitz
from optx.analysis.calibration import calibration_error as calibration_error
from optx.analysis.counterfactual.search import Counterfactuals as Counterfactuals
from optx.analysis.counterfactual.search import robust_counterfactual as robust_counterfactual
from optx.analysis.counterfactual.stability import stability as stability
from optx.analysis.counterfactual.stability import stability_bound as stability_bound
from optx.analysis.gradients import grad_norms as grad_norms
from optx.analysis.gradients import nlm_alignment as nlm_alignment
from optx.analysis.interaction.basis import InteractionBasis as InteractionBasis
from optx.analysis.interaction.basis import interaction_basis as interaction_basis
from optx.analysis.interaction.degeneracy import Degeneracy as Degeneracy
from optx.analysis.interaction.degeneracy import degeneracy as degeneracy
from optx.analysis.report import report as report
from optx.analysis.single_threaded import SingleThreaded as SingleThreaded
from optx.analysis.single_threaded import single_threadedness as single_threadedness
from optx.analysis.softmax import softmax_collapse as softmax_collapse
from optx.delta._input_stats import InputStats as InputStats
from optx.delta._input_stats import input_stats as input_stats

__all__ = [
    "AttentionMargins",
    "AttentionSVM",
    "Counterfactuals",
    "Degeneracy",
    "InputStats",
    "InteractionBasis",
    "LipschitzBound",
    "Report",
    "SingleThreaded",
    "attention_margins",
    "attention_svm",
    "calibration_error",
    "corr",
    "degeneracy",
    "grad_norms",
    "input_stats",
    "interaction_basis",
    "lipschitz",
    "nlm_alignment",
    "report",
    "robust_counterfactual",
    "single_threadedness",
    "softmax_collapse",
    "stability",
    "stability_bound",
]
