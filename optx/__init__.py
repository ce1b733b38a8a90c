"""optx: training-time methods for PyTorch, one line each.

    wrap    optx.wrap(optimizer, optx.PerpGrad(), ...)        what a step does to weights
            AdamR  BackSlash  Clip  DSPReg  HFT  KeepMask  MuAdamW  NormalizedGrad  PerpGrad  SaRA  SubGM
            param_groups                                      groups with what modules ask for
            save_optimizer  load_optimizer                    checkpoints by the parameters' names
            convert_state                                     moments of 8 bits, and of other libraries
            Transform  rule  Moments  Slot  like_weight  per_tensor  per_row   to write your own
            per_column  counter  ops
            register_base  BaseRules  Sums  Matrices          to have an optimizer of your own fused
            Wrapped  Plan  Released                           what wrap returns, and what it tells

    attach  optx.attach(model, optx.LoRA(rank=8), ...)        what modules compute
            LoRA (rsLoRA, DoRA)  FLoRA  SVFit  BitFit  IA3  PrefixTuning  MAM  Aside  IAA
            ParallelAdapter  ScaledParallelAdapter  SequentialAdapter  MultiHeadParallelAdapter
            HiddenDelta
            MuReadout  MuAttention                            factors of width
            StableRPS  SharedHandle                           all weights read from one short array
            Perp  PerpHandle                                  what a pruned model is retrained by
            STN  HParams  hp  SelfTuning                      hyperparameters tuned in the same run
            ABMLL  ABMLLHandle  ABMLLTask                     priors over tasks, few-shot, with uncertainty
            WindowPrune  WindowBlock  WindowHandle  WindowCost   computes only the windows that need it
            FTWT  FilterPruning                               filters picked for each sample
            PSDFactor                                         a weight as U U^T
            VQLogits  VQHandle                                an output head of a few codes
            Softmax2                                          softmax in two passes over a row
            EWA  ExpertHandle                                 experts in training, their mean afterwards
            WideNet  WideHandle                               blocks that share attention and experts
            S4D  S4DLayer                                     state spaces in attention's place
            RF8Linear                                         weights in bytes, computed with as they are
            SphericalHead  SphericalHandle                    output heads of very many classes
            LSSA  LSSAR                                       attention that stays sharp over long rows
            PMOEHead  PMOEHandle                              policies of several modes
            LDLT  LDLTHandle                                  chains of layers that are L-Lipschitz
            SoftThinking  ThinkingHandle  Rollout             mixtures of tokens fed while a model thinks
            MaxMin  GroupSort  Householder                    modules: activations that keep norms
            Implicit                                          a network that is a fixed point
            trainable_only                                    freeze all but what was attached
            set_adapter                                       which of several act, by name
            export_lora  fold_prefix                          what remains to do after the training
            Injection  Composite  Part  Site  Weights         to write your own
            Handle  Report  Frozen                            what attach and trainable_only return

    loss    optx.StableMaxCrossEntropy()
            StableMaxCrossEntropy  stablemax_cross_entropy
            LossReweight                                      samples weighted by their losses
            RobustRecoveryLoss                                absolute residuals of a factored matrix
            SAF  MESA  with_index                             flat minima from what was said epochs ago
            SofTGRPO                                          rewards of what was thought in mixtures
            functional: softmax2  logsumexp2  cross_entropy2  rows read twice where torch reads them thrice
                lssa_attention  lssar_attention               what LSSA and LSSAR compute, by itself
                soft_logprob  grpo_advantage  ppo_clip_loss  k3_divergence   of policy gradients
            ZLoss                                             of standardised logits; many classes
            FrequencyLoss  sac_pmoe_losses  sac_pmoe_target  ppo_pmoe_losses   policies of several modes
            policy: ActionMixture  least_q  gumbel_weights  score_ratio_loss  enumerated_loss
            GumbelFlow  STGuide                               sequences of tokens by a flow, and its guidance

    delta   optx.Delta.between(base, tuned), optx.merge(...)  checkpoints pruned, compressed and merged
            Delta: dare  find_q  magnitude  wanda  structural  lora
            compress  ComPEFT  Compressed                     signs and one scale
            rf8: pack  unpack  quantise  Packed               weights in floats of 8 bits
                 save  load  load_into
            merge: TaskArithmetic  TIES  DARELinear  DARETIES  PCB
            merge_yaml                                        a merge as mergekit's YAML describes it
            search  Found                                     a merge's numbers, tried on validation data
            deepshape                                         weights moved to what takes fewer bits
            patch  Patch  shallowest  rws  Signature          robustness that is added to a model
            MergeMethod                                       to write your own

    prune   masks = optx.prune(model, optx.Magnitude(0.5))    weights that go in one pass
            Magnitude  Wanda  SparseGPT  Masks
            reconstruct  Reconstruction                       blocks fitted to what they were, by Perp

    tell    optx.analysis                                     diagnostics; they change nothing
            calibration_error  grad_norms  input_stats  nlm_alignment  softmax_collapse
            interaction_basis  degeneracy                     directions that matter, and weights that do not
            attention_svm  corr                               which tokens attention tells apart
            lipschitz  LipschitzBound                         certified bounds of what a network can change by
            attention_svm  attention_margins  corr            which tokens attention tells apart
            report                                            on one page, with a picture
            single_threadedness                               what mixtures of tokens do to a model
            stability  stability_bound                        whether a decision outlives the model
            robust_counterfactual  Counterfactuals            what would have to differ for another one
            rate                                              bits per weight
            optx.init                                         first weights
            gg_                                               of a generalised Gaussian
            optx.scaling                                      tune small, train large: its help has the order
            shapes  Shapes  Width                             which dimensions are width
            init_  mup  group_lrs                             first weights and param groups by width
            small_init_                                       factors that begin near 0
            coordinate_check  CoordinateCheck                 which layers grow or vanish with width
            sublayer_gain  GainMonitor  fit_gains             top singular values, in training too
            abc  ABC  feature_change  infinite_width_linear   what becomes of a network as it grows wide
            step_law  fit_step_law  non_embedding_params      learning rate and batch size of pretraining

    config  optx.from_config({"transforms": ["PerpGrad"]}, opt)   all of it out of a plain dict (YAML, Hydra)
            from_config  Configured                           what it returns
            to_config                                         and back

    engine  optx.integrations                                 other people's trainers, one line in each
            transformers  accelerate  lightning               Trainer (TRL's too), Accelerator, Lightning's

    errors  OptxError, and of it FileError  FusedError  MergeError  ShapeError  TargetError  TransformError

``help(optx.HFT)`` or ``optx show HFT`` say all of one; ``optx list`` names every method, and
``optx list WORD`` what has to do with a word.
"""

__version__ = "0.1.0"

import typing as _typing

from optx import bases as bases
from optx import functional as functional
from optx import ops as ops
from optx._errors import FileError as FileError
from optx._errors import FusedError as FusedError
from optx._errors import MergeError as MergeError
from optx._errors import OptxError as OptxError
from optx._errors import ShapeError as ShapeError
from optx._errors import TargetError as TargetError
from optx._errors import TransformError as TransformError
from optx._masks import Masks as Masks
from optx._param_groups import param_groups as param_groups
from optx._rules import rule as rule
from optx.inject._abmll_handle import ABMLLHandle as ABMLLHandle
from optx.inject._abmll_task import ABMLLTask as ABMLLTask
from optx.inject._attach import attach as attach
from optx.inject._code_handle import VQHandle as VQHandle
from optx.inject._expert_handle import ExpertHandle as ExpertHandle
from optx.inject._export import export_lora as export_lora
from optx.inject._filter_pruning import FilterPruning as FilterPruning
from optx.inject._fold_prefix import fold_prefix as fold_prefix
from optx.inject._freeze import Frozen as Frozen
from optx.inject._freeze import trainable_only as trainable_only
from optx.inject._handle import Handle as Handle
from optx.inject._hparams import HParams as HParams
from optx.inject._hparams import hp as hp
from optx.inject._injection import Composite as Composite
from optx.inject._injection import Injection as Injection
from optx.inject._injection import Site as Site
from optx.inject._part import Part as Part
from optx.inject._part import Weights as Weights
from optx.inject._perp_handle import PerpHandle as PerpHandle
from optx.inject._report import Report as Report
from optx.inject._s4d_layer import S4DLayer as S4DLayer
from optx.inject._self_tuning import SelfTuning as SelfTuning
from optx.inject._shared_handle import SharedHandle as SharedHandle
from optx.inject._spherical_handle import SphericalHandle as SphericalHandle
from optx.inject._switch import set_adapter as set_adapter
from optx.inject._wide_handle import WideHandle as WideHandle
from optx.inject._window_block import WindowBlock as WindowBlock
from optx.inject._window_cost import WindowCost as WindowCost
from optx.inject._window_handle import WindowHandle as WindowHandle
from optx.inject.abmll import ABMLL as ABMLL
from optx.inject.adapters import ParallelAdapter as ParallelAdapter
from optx.inject.adapters import ScaledParallelAdapter as ScaledParallelAdapter
from optx.inject.adapters import SequentialAdapter as SequentialAdapter
from optx.inject.bitfit import BitFit as BitFit
from optx.inject.ewa import EWA as EWA
from optx.inject.flora import FLoRA as FLoRA
from optx.inject.ftwt import FTWT as FTWT
from optx.inject.hidden_delta import HiddenDelta as HiddenDelta
from optx.inject.ia3 import IA3 as IA3
from optx.inject.iaa import IAA as IAA
from optx.inject.iaa import Aside as Aside
from optx.inject.lora import LoRA as LoRA
from optx.inject.lssa import LSSA as LSSA
from optx.inject.lssa import LSSAR as LSSAR
from optx.inject.mam import MAM as MAM
from optx.inject.multihead import MultiHeadParallelAdapter as MultiHeadParallelAdapter
from optx.inject.perp import Perp as Perp
from optx.inject.prefix import PrefixTuning as PrefixTuning
from optx.inject.psd_factor import PSDFactor as PSDFactor
from optx.inject.rf8_linear import RF8Linear as RF8Linear
from optx.inject.s4d import S4D as S4D
from optx.inject.softmax2 import Softmax2 as Softmax2
from optx.inject.spherical_head import SphericalHead as SphericalHead
from optx.inject.stable_rps import StableRPS as StableRPS
from optx.inject.stn import STN as STN
from optx.inject.svfit import SVFit as SVFit
from optx.inject.vq_logits import VQLogits as VQLogits
from optx.inject.widenet import WideNet as WideNet
from optx.inject.window_prune import WindowPrune as WindowPrune
from optx.signal._with_index import with_index as with_index
from optx.signal.loss_reweight import LossReweight as LossReweight
from optx.signal.mesa import MESA as MESA
from optx.signal.robust_recovery import RobustRecoveryLoss as RobustRecoveryLoss
from optx.signal.saf import SAF as SAF
from optx.signal.stablemax import StableMaxCrossEntropy as StableMaxCrossEntropy
from optx.signal.stablemax import stablemax_cross_entropy as stablemax_cross_entropy
from optx.signal.z_loss import ZLoss as ZLoss
from optx.step.base_update import BaseRules as BaseRules
from optx.step.base_update import Matrices as Matrices
from optx.step.base_update import Sums as Sums
from optx.step.bases import register_base as register_base
from optx.step.checkpoint import load_optimizer as load_optimizer
from optx.step.checkpoint import save_optimizer as save_optimizer
from optx.step.convert import convert_state as convert_state
from optx.step.declared import Slot as Slot
from optx.step.declared import counter as counter
from optx.step.declared import like_weight as like_weight
from optx.step.declared import per_column as per_column
from optx.step.declared import per_row as per_row
from optx.step.declared import per_tensor as per_tensor
from optx.step.plan import Plan as Plan
from optx.step.release import Released as Released
from optx.step.step_moments import Moments as Moments
from optx.step.transform import Transform as Transform
from optx.step.wrap import wrap as wrap
from optx.step.wrapped import Wrapped as Wrapped
from optx.transforms.adamr import AdamR as AdamR
from optx.transforms.backslash import BackSlash as BackSlash
from optx.transforms.clip import Clip as Clip
from optx.transforms.dsp_reg import DSPReg as DSPReg
from optx.transforms.hft import HFT as HFT
from optx.transforms.keep_mask import KeepMask as KeepMask
from optx.transforms.normalized_grad import NormalizedGrad as NormalizedGrad
from optx.transforms.perpgrad import PerpGrad as PerpGrad
from optx.transforms.sara import SaRA as SaRA
from optx.transforms.subgm import SubGM as SubGM

if _typing.TYPE_CHECKING:
    from optx import analysis as analysis
    from optx import init as init
    from optx import integrations as integrations
    from optx import policy as policy
    from optx import rf8 as rf8
    from optx import scaling as scaling
    from optx._config import Configured as Configured
    from optx._config import from_config as from_config
    from optx._config_written import to_config as to_config
    from optx.analysis.rate import rate as rate
    from optx.delta import rws as rws
    from optx.delta._compressed import Compressed as Compressed
    from optx.delta._coordinate_search import Found as Found
    from optx.delta._coordinate_search import search as search
    from optx.delta._delta import Delta as Delta
    from optx.delta._first_layers import shallowest as shallowest
    from optx.delta._merge_method import MergeMethod as MergeMethod
    from optx.delta._mergekit import merge_yaml as merge_yaml
    from optx.delta._patch import Patch as Patch
    from optx.delta._patch import patch as patch
    from optx.delta.arithmetic import TaskArithmetic as TaskArithmetic
    from optx.delta.compeft import ComPEFT as ComPEFT
    from optx.delta.compeft import compress as compress
    from optx.delta.dare import DARETIES as DARETIES
    from optx.delta.dare import DARELinear as DARELinear
    from optx.delta.deepshape import deepshape as deepshape
    from optx.delta.merge import merge as merge
    from optx.delta.pcb import PCB as PCB
    from optx.delta.rws import Signature as Signature
    from optx.delta.ties import TIES as TIES
    from optx.flow.gumbel_flow import GumbelFlow as GumbelFlow
    from optx.flow.st_guide import STGuide as STGuide
    from optx.lipschitz._ldlt_handle import LDLTHandle as LDLTHandle
    from optx.lipschitz.activations import GroupSort as GroupSort
    from optx.lipschitz.activations import Householder as Householder
    from optx.lipschitz.activations import MaxMin as MaxMin
    from optx.lipschitz.implicit import Implicit as Implicit
    from optx.lipschitz.ldlt import LDLT as LDLT
    from optx.policy._pmoe_handle import PMOEHandle as PMOEHandle
    from optx.policy.frequency_loss import FrequencyLoss as FrequencyLoss
    from optx.policy.pmoe_head import PMOEHead as PMOEHead
    from optx.policy.ppo import ppo_pmoe_losses as ppo_pmoe_losses
    from optx.policy.sac import sac_pmoe_losses as sac_pmoe_losses
    from optx.policy.sac import sac_pmoe_target as sac_pmoe_target
    from optx.pruning._prune import prune as prune
    from optx.pruning._reconstruct import Reconstruction as Reconstruction
    from optx.pruning._reconstruct import reconstruct as reconstruct
    from optx.pruning.magnitude import Magnitude as Magnitude
    from optx.pruning.sparsegpt import SparseGPT as SparseGPT
    from optx.pruning.wanda import Wanda as Wanda
    from optx.scaling.mu_adamw import MuAdamW as MuAdamW
    from optx.scaling.mu_attention import MuAttention as MuAttention
    from optx.scaling.mu_readout import MuReadout as MuReadout
    from optx.thinking._handle import ThinkingHandle as ThinkingHandle
    from optx.thinking._record import Rollout as Rollout
    from optx.thinking.soft_grpo import SofTGRPO as SofTGRPO
    from optx.thinking.soft_thinking import SoftThinking as SoftThinking

# What a step and an attached model need not is loaded by its first use. tests/front/test_import_time.py holds
# this table to the imports above, which type checkers read.
_LATER = {
    "analysis": "optx.analysis",
    "init": "optx.init",
    "integrations": "optx.integrations",
    "policy": "optx.policy",
    "rf8": "optx.rf8",
    "scaling": "optx.scaling",
    "Configured": "optx._config:Configured",
    "from_config": "optx._config:from_config",
    "to_config": "optx._config_written:to_config",
    "rate": "optx.analysis.rate:rate",
    "rws": "optx.delta.rws",
    "Compressed": "optx.delta._compressed:Compressed",
    "Found": "optx.delta._coordinate_search:Found",
    "search": "optx.delta._coordinate_search:search",
    "Delta": "optx.delta._delta:Delta",
    "shallowest": "optx.delta._first_layers:shallowest",
    "MergeMethod": "optx.delta._merge_method:MergeMethod",
    "merge_yaml": "optx.delta._mergekit:merge_yaml",
    "Patch": "optx.delta._patch:Patch",
    "patch": "optx.delta._patch:patch",
    "TaskArithmetic": "optx.delta.arithmetic:TaskArithmetic",
    "ComPEFT": "optx.delta.compeft:ComPEFT",
    "compress": "optx.delta.compeft:compress",
    "DARETIES": "optx.delta.dare:DARETIES",
    "DARELinear": "optx.delta.dare:DARELinear",
    "deepshape": "optx.delta.deepshape:deepshape",
    "merge": "optx.delta.merge:merge",
    "PCB": "optx.delta.pcb:PCB",
    "Signature": "optx.delta.rws:Signature",
    "TIES": "optx.delta.ties:TIES",
    "GumbelFlow": "optx.flow.gumbel_flow:GumbelFlow",
    "STGuide": "optx.flow.st_guide:STGuide",
    "GroupSort": "optx.lipschitz.activations:GroupSort",
    "Householder": "optx.lipschitz.activations:Householder",
    "Implicit": "optx.lipschitz.implicit:Implicit",
    "MaxMin": "optx.lipschitz.activations:MaxMin",
    "LDLT": "optx.lipschitz.ldlt:LDLT",
    "LDLTHandle": "optx.lipschitz._ldlt_handle:LDLTHandle",
    "PMOEHandle": "optx.policy._pmoe_handle:PMOEHandle",
    "FrequencyLoss": "optx.policy.frequency_loss:FrequencyLoss",
    "PMOEHead": "optx.policy.pmoe_head:PMOEHead",
    "ppo_pmoe_losses": "optx.policy.ppo:ppo_pmoe_losses",
    "sac_pmoe_losses": "optx.policy.sac:sac_pmoe_losses",
    "sac_pmoe_target": "optx.policy.sac:sac_pmoe_target",
    "prune": "optx.pruning._prune:prune",
    "Reconstruction": "optx.pruning._reconstruct:Reconstruction",
    "reconstruct": "optx.pruning._reconstruct:reconstruct",
    "Magnitude": "optx.pruning.magnitude:Magnitude",
    "SparseGPT": "optx.pruning.sparsegpt:SparseGPT",
    "Wanda": "optx.pruning.wanda:Wanda",
    "MuAdamW": "optx.scaling.mu_adamw:MuAdamW",
    "MuAttention": "optx.scaling.mu_attention:MuAttention",
    "MuReadout": "optx.scaling.mu_readout:MuReadout",
    "ThinkingHandle": "optx.thinking._handle:ThinkingHandle",
    "Rollout": "optx.thinking._record:Rollout",
    "SofTGRPO": "optx.thinking.soft_grpo:SofTGRPO",
    "SoftThinking": "optx.thinking.soft_thinking:SoftThinking",
}


def __getattr__(name: str) -> _typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module 'optx' has no attribute {name!r}")
    import pkgutil

    found = globals()[name] = pkgutil.resolve_name(_LATER[name])  # so that this is asked once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
