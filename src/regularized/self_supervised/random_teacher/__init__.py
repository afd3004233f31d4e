"""Random Teachers are Good Teachers."""

from regularized.self_supervised.random_teacher.layer import BottleneckHead, EncoderWithHead
from regularized.self_supervised.random_teacher.loss import chunked_distillation_loss, distillation_losses
from regularized.self_supervised.random_teacher.student_init import draw_weights, interpolate_init, neighbourhood_init
from regularized.self_supervised.random_teacher.teacher import RandomTeacher
from regularized.self_supervised.random_teacher.term import MatchRandomTeacher

__all__ = [
    "BottleneckHead",
    "EncoderWithHead",
    "MatchRandomTeacher",
    "RandomTeacher",
    "chunked_distillation_loss",
    "distillation_losses",
    "draw_weights",
    "interpolate_init",
    "neighbourhood_init",
]
