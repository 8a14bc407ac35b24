"""What every service stands on: settings, telemetry, gRPC, errors, access, lifecycle, clock. One module for each; import what you need."""
