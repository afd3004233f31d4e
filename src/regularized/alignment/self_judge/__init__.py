"""Self-Judge: a language model that grades answers without a reference, taught by its own view with the reference."""

from regularized.alignment.self_judge.agreement import pairwise_accuracy, pearson, spearman
from regularized.alignment.self_judge.grades import GRADES, digit_token_ids, expected_score
from regularized.alignment.self_judge.labels import checked_grades, combined_grades
from regularized.alignment.self_judge.loss import PrivilegedDistillation, view_divergence, views_loss
from regularized.alignment.self_judge.procedure import Judge, LastLogits, Vocabulary, last_logits, score_answers
from regularized.alignment.self_judge.select import SelectiveGate, best_of_n, select_instructions
from regularized.alignment.self_judge.term import PrivilegedView
from regularized.alignment.self_judge.views import RESPONSE, Answer, View, prompt, view_of

__all__ = [
    "GRADES",
    "RESPONSE",
    "Answer",
    "Judge",
    "LastLogits",
    "PrivilegedDistillation",
    "PrivilegedView",
    "SelectiveGate",
    "View",
    "Vocabulary",
    "best_of_n",
    "checked_grades",
    "combined_grades",
    "digit_token_ids",
    "expected_score",
    "last_logits",
    "pairwise_accuracy",
    "pearson",
    "prompt",
    "score_answers",
    "select_instructions",
    "spearman",
    "view_divergence",
    "view_of",
    "views_loss",
]
