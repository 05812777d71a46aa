"""What SOAP costs on a model, before anything is trained: memory, FLOPs, and the options that meet a budget.

Everything is computed from shapes; no weight is allocated.
"""

from emerging_optimizers.plan.budgets import Budget, Change, Fit, Proposal, fit_budget
from emerging_optimizers.plan.calibration import Prediction, Rates, calibrate, predict
from emerging_optimizers.plan.costs import Cost
from emerging_optimizers.plan.planning import Plan, Row, Share, plan
from emerging_optimizers.plan.shapes import Model, model_of
from emerging_optimizers.plan.sources import PRESETS, load_model

__all__ = [
    "PRESETS",
    "Budget",
    "Change",
    "Cost",
    "Fit",
    "Model",
    "Plan",
    "Prediction",
    "Proposal",
    "Rates",
    "Row",
    "Share",
    "calibrate",
    "fit_budget",
    "load_model",
    "model_of",
    "plan",
    "predict",
]
