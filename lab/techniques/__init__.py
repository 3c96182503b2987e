"""What claims to train faster: one file each here, and one line each in lab.technique, with the settings.

Each follows its paper, is charged what it executes, and says where released code differs (docs/techniques.md has the table).
"""
