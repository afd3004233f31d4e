"""Fire Together Wire Together: dynamic pruning with self-supervised mask prediction."""

from regularized.compression.dynamic_pruning.groups import FilterGroup, Survey, find_groups
from regularized.compression.dynamic_pruning.layer import DynamicConv2d, MaskPredictor
from regularized.compression.dynamic_pruning.loss import mask_agreement, mask_loss
from regularized.compression.dynamic_pruning.masks import filter_strengths, mass_mask, predicted_mask, top_mask
from regularized.compression.dynamic_pruning.operations import Operations, convolution_macs
from regularized.compression.dynamic_pruning.sparse import sparse_inference
from regularized.compression.dynamic_pruning.term import DynamicPruning, dynamic_layers, pruning_param_groups

__all__ = [
    "DynamicConv2d",
    "DynamicPruning",
    "FilterGroup",
    "MaskPredictor",
    "Operations",
    "Survey",
    "convolution_macs",
    "dynamic_layers",
    "filter_strengths",
    "find_groups",
    "mask_agreement",
    "mask_loss",
    "mass_mask",
    "predicted_mask",
    "pruning_param_groups",
    "sparse_inference",
    "top_mask",
]
