"""Do objects stand where a layout asks for them? Every region method on held-out layouts, measured with intervals."""
