"""The AUTOMATIC1111 WebUI as a host: the only place that imports its `modules`."""
