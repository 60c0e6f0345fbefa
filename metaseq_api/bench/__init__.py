"""What is measured beside the tests: how fast files are resharded (`files`). The engine's are the door's own."""
