"""What every service stands on: settings, telemetry, gRPC, errors, access, lifecycle, clock. One module for each; import what you need."""

import os

# gRPC's C core writes lines of its own to stderr, among our JSON logs. What it says as information ("skipping fork() handlers") is of use
# to nobody; its errors stay. It reads this once, when it is imported: before that, and so before any module of this package.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Its handlers of fork() can end the child with a code of their own. A child of ours calls exec at once and needs none of gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
