"""Task files of lm-eval, one of each kind; DATA is replaced by the path of a file of rows {"q", "choices", "label"}."""

TASKS = {"choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""", "perplexity": """
task: perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q * 3}}some text"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""", "writing": """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}a"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["zq"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""}
