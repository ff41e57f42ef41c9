"""The pipeline's components in the order in which they run: thin skins over `distillery.steps`."""

# ruff: noqa: I001 - flow order says more than the alphabet
from components._step import IMAGE
from components.plan import plan
from components.prepare_data import prepare_data
from components.plan_teachers import plan_teachers
from components.train_teacher import train_teacher
from components.gather_teachers import gather_teachers
from components.synthesize import synthesize
from components.plan_pieces import plan_pieces
from components.synthesize_piece import synthesize_piece
from components.bundle_pieces import bundle_pieces
from components.gather_pieces import gather_pieces
from components.relabel import relabel
from components.evaluate_student import evaluate_student
from components.report import report
from components.verdict import verdict

__all__ = [
    "IMAGE",
    "plan",
    "prepare_data",
    "plan_teachers",
    "train_teacher",
    "gather_teachers",
    "synthesize",
    "plan_pieces",
    "synthesize_piece",
    "bundle_pieces",
    "gather_pieces",
    "relabel",
    "evaluate_student",
    "report",
    "verdict",
]
