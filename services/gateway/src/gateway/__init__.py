"""The gateway: the data path to the runtimes (/v2), and the control API beside it on the same port."""
