"""What a conversation in the terminal is made of: what was said, engines that answer token by token, and the screen."""
