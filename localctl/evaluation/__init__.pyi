from .compare import Comparison as Comparison
from .sheets import contact_sheet as contact_sheet
from .tables import latex as latex
from .tables import markdown as markdown
from .tables import plot as plot
