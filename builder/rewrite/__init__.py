"""Any exporter's graph as plain nodes: functions, control flow, size arithmetic, attention."""
