from .model import LayoutPredictor as LayoutPredictor
from .model import load_predictor as load_predictor
from .parsing import PromptObject as PromptObject
from .parsing import parse as parse
