"""A switch of LoRAs on a GPU: what one layer after the other costs in launches, transfers and waiting is paid once."""
