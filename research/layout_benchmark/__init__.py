"""Are objects where a layout asks for them? Every region method is measured on held-out layouts, with intervals."""
