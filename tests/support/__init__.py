"""What tests of several folders share: commands and their processes, generated images, tiny runs, a loopback Hub."""
