from .adapters import ADAPTER_FORMATS as ADAPTER_FORMATS
from .adapters import Converted as Converted
from .adapters import bundle_adapters as bundle_adapters
from .adapters import convert_adapter as convert_adapter
from .layouts import LAYOUT_FORMATS as LAYOUT_FORMATS
from .layouts import export_layout as export_layout
from .layouts import import_layout as import_layout
from .parts import Exported as Exported
