"""What the techniques can be asked for, by name; to be had without torch."""

WEIGHT_METHODS = ("magnitude", "obd", "random")
SCOPES = ("global", "layer", "lamp")
FILTER_METHODS = ("l2", "l1", "fpgm", "bn_scale", "shuffled", "random")
THRESHOLD_MODES = ("relative", "absolute", "quantile")
