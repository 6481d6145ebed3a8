"""What a torch model says when it is asked: answers to rows, a chat, how well it does them."""
