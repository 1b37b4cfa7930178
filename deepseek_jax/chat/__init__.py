"""Chats as token ids: messages, the templates of checkpoints, and the sandbox that templates run in."""
