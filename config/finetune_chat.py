# strategy: conversations (data/chat/prepare.py); only the assistant's texts count in the loss
# The model knows the language; it learns the turns, and when to stop. Use a low learning rate,
# dropout against memorizing answers, few epochs, and the best checkpoint by validation loss.
# Tokens attend only to their own conversation. Then: python sample.py --out_dir=out-chat --chat
out_dir = "out-chat"
eval_interval = 20
eval_iters = 200
log_interval = 10

dataset = "chat"
init_from = "gpt2"
separate_documents = True
batch_size = 4
gradient_accumulation_steps = 8

learning_rate = 3e-5
dropout = 0.1
epochs = 3
warmup_iters = 10
always_save_checkpoint = False
patience = 5  # stop after five evaluations without improvement
