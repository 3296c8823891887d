"""The page: gradio 3.41.2 as in the WebUI, or newest gradio by itself, from one source."""
