"""Chat templates with the constructs that published models use, and conversations of every kind, written for tests."""

# ruff: noqa: E501 - a template is easier to read uncut

from __future__ import annotations

from typing import Any

_CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

TEMPLATES = {
    "chatml": _CHATML + _ASK,
    "concatenated": "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content + eos_token }}{% endfor %}",
    "trimmed": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% set x = 1 %}" + _ASK,
    "system first": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = "
    "messages[1:] %}{%- else %}{%- set system = 'none' %}{%- set rest = messages %}{%- endif %}{{ '<<' ~ system ~ '>>' }}"
    "{%- for m in rest %}{{- '\n' + m.role + '=' + (m.content or '') }}{%- endfor %}",
    "alternating": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}|{% endfor %}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}",
    "tools": "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}{% for m in messages %}"
    "{{ m.role }}{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% elif m.content is defined %}{{ m.content }}{% endif %}"
    "\n{% endfor %}" + _ASK,
    "arguments": "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>{{ v if v is string else v | tojson(ensure_ascii=False) }}{% endfor %}{% endfor %}{% endfor %}",
    "json options": "{{ tools | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    "{{ messages | tojson(indent=2) }}{{ documents | tojson }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}"
    "{% break %}{% endif %}{{ m.content }};{% endfor %}",
    "thinking": "{% for m in messages %}{% set c = m.content or '' %}{% if m.reasoning_content is string %}<think>"
    "{{ m.reasoning_content }}</think>{% elif '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{{ c }}\n{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>"
    "{% endif %}",
    "namespace": "{% set ns = namespace(last=-1, text='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages[::-1] %}{% set ns.text = m.role ~ ns.text %}"
    "{% endfor %}{{ ns.last }}{{ ns.text }}{{ messages | map(attribute='role') | join(',') }}",
    "macro": "{% macro show(m, mark='#') %}{{ mark }}{{ m.role | upper }} {{ caller() if caller else m.content }}"
    "{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}{{ messages[0].role.title() }}",
    "date": "{% if date is not defined %}{% set date = strftime_now('%Y') %}{% endif %}{{ date }}{{ unk_token }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "blocks": "{% for m in messages %}\n    {% if loop.first %}\n  first\n    {% endif %}\n    {{ m.content }}\n{% endfor %}\n",
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}{{ messages[-1].content }}",
    "header ids": "{{- bos_token }}{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}"
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}{{- '<|header|>system<|/header|>\n\n' + date_string + '\n' + system }}"
    "{%- if tools is not none and tools %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{%- endif %}"
    "{%- for message in messages %}{%- if not (message.role == 'tool' or message.role == 'ipython' or 'tool_calls' in message) %}"
    "{{- '<|header|>' + message['role'] + '<|/header|>\n\n' + message['content'] | trim + '<|eot|>' }}{%- elif 'tool_calls' in message %}"
    "{%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call at once') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}"
    "{{- call.arguments | tojson }}{{- '}' }}{%- else %}{{- '<|header|>ipython<|/header|>\n\n' }}{%- if message.content is mapping or "
    "message.content is iterable %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}{%- endif %}{%- endfor %}",
    "last query": "{%- set ns = namespace(multi=true, last=messages | length - 1) %}{%- for m in messages[::-1] %}"
    "{%- set index = (messages | length - 1) - loop.index0 %}{%- if ns.multi and m.role == 'user' and m.content is string and not "
    "(m.content.startswith('<response>') and m.content.endswith('</response>')) %}{%- set ns.multi = false %}{%- set ns.last = index %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'assistant' %}{%- set thought = '' %}{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{%- else %}{{- content }}{%- endif %}"
    "{%- elif m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|user|>' }}{%- endif %}"
    "{{- '\n<response>\n' + content + '\n</response>' }}{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|end|>' }}"
    "{%- endif %}{%- else %}{{- '<|' + m.role + '|>' + content }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|assistant|>' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}",
    "flags": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system = ns.system + '\n\n' + message['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
    "{{ '<User>' + message['content'] }}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}"
    "{%- for call in message['tool_calls'] %}{%- if not ns.is_first %}{{ '<Calls>' + call['type'] + '<sep>' + call['function']['name'] }}"
    "{%- set ns.is_first = true -%}{%- else %}{{ '\n' + call['type'] + '<sep>' + call['function']['name'] }}{%- endif %}{%- endfor %}"
    "{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<Bot>' + content + eos_token }}"
    "{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
    "{{ '<Outputs>' + message['content'] }}{%- set ns.is_output_first = false %}{%- else %}{{ '\n' + message['content'] }}{%- endif %}"
    "{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{ '<Bot><think>\\n' }}{% endif %}",
    "inst": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}{%- for m in loop_messages %}"
    "{%- if m['role'] == 'user' %}{%- if tools is not none and (m == user_messages[-1]) %}{{- '[AVAILABLE_TOOLS] [' }}{%- for tool in tools %}"
    '{%- set tool = tool.function %}{{- \'{"type": "function", "function": {\' }}{%- for key, val in tool.items() if key != \'return\' %}'
    "{%- if val is string %}{{- '\"' + key + '\": \"' + val + '\"' }}{%- else %}{{- '\"' + key + '\": ' + val | tojson }}{%- endif %}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '}}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}"
    "{%- endfor %}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + "
    "m['content'] + '[/INST]' }}{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}{%- elif m['role'] == 'assistant' and "
    "m.tool_calls is not defined %}{{- ' ' + m['content'] | trim + eos_token }}{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in m.tool_calls %}{%- set out = call.function | tojson %}{{- out[:-1] }}{%- if not call.id is defined %}"
    "{{- raise_exception('no id') }}{%- endif %}{{- ', \"id\": \"' + call.id + '\"}' }}{%- endfor %}{{- ']' + eos_token }}{%- endif %}{%- endfor %}",
    "model role": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<turn>' + role + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<turn>model\n'}}{% endif %}",
    "first user prefix": "{%- if messages[0].role == 'system' -%}{%- if messages[0].content is string -%}{%- set prefix = messages[0].content "
    "+ '\n\n' -%}{%- else -%}{%- set prefix = messages[0].content[0].text + '\n\n' -%}{%- endif -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}{%- for m in rest -%}{{ m.role }}:{{ prefix if loop.first }}"
    "{%- if m.content is string -%}{{ m.content | trim }}{%- elif m.content is iterable -%}{%- for item in m.content -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}{%- endfor -%}",
    "typed": "{%- macro json_type(spec) %}{%- set types = {'string': 'str', 'number': 'float', 'object': 'dict'} %}"
    "{%- if types[spec.type] is defined %}{{- types[spec.type] }}{%- elif spec.type == 'array' %}{{- 'list[' + json_type(spec.items) + ']' }}"
    "{%- elif spec.type is iterable and spec.type is not string %}{%- for t in spec.type %}{{- json_type({'type': t}) }}"
    "{%- if not loop.last %}{{- ',' }}{%- endif %}{%- endfor %}{%- else %}{{- 'Any' }}{%- endif %}{%- endmacro %}"
    "{%- for tool in tools or [] %}{%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}{{- tool.name + '(' }}"
    "{%- for name, fields in (tool.parameters.properties or {}) | items %}{{- name + ': ' + json_type(fields) }}{%- endfor %}{{- ') ' }}"
    "{{- tool.description }}{%- endfor %}{{- json_type({'type': ['string', 'null']}) }}{% for m in messages %}{{ m.role }}{% endfor %}",
    "visible text": "[gMASK]<sop>{%- macro visible(content) -%}{%- if content is string -%}{{ content }}{%- elif content is iterable and "
    "content is not mapping -%}{%- for item in content -%}{%- if item is mapping and item.type == 'text' -%}{{- item.text }}"
    "{%- elif item is string -%}{{- item }}{%- endif -%}{%- endfor -%}{%- else -%}{{- content }}{%- endif -%}{%- endmacro -%}"
    "{%- for m in messages %}<|{{ m.role }}|>{{ visible(m.content) }}{%- if m.role == 'assistant' and m.tool_calls -%}"
    "{%- for tc in m.tool_calls -%}{%- if tc.function -%}{%- set tc = tc.function -%}{%- endif -%}{{ '\n<tool_call>' + tc.name }}"
    "{% set _args = tc.arguments %}{% for k, v in _args.items() %}<k>{{ k }}</k><v>{{ v | tojson(ensure_ascii=False) if v is not string "
    "else v }}</v>{% endfor %}</tool_call>{%- endfor -%}{%- endif -%}{{- '/nothink' if (enable_thinking is defined and not enable_thinking "
    "and not visible(m.content).endswith('/nothink')) else '' -}}{%- endfor %}",
    "indexed ids": "{%- macro render(msg) -%}{%- set c = msg.get('content') -%}{%- if c is string -%}{{ c }}{%- elif c is not none -%}"
    "{% for p in c -%}{{ p['text'] if p['type'] == 'text' }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- if tools -%}<decl>{{ tools | tojson(separators=(',', ':')) }}</decl>{%- endif -%}{% for message in messages %}"
    "{%- if loop.first and messages[0]['role'] != 'system' -%}<sys>default</sys>{% endif %}{%- set name = message.get('name') or "
    "message['role'] -%}<{{ name }}>{%- if message['role'] == 'assistant' and message.get('tool_calls') -%}{{ render(message) }}"
    "{%- for tool_call in message['tool_calls'] -%}{%- set id = tool_call['id'] -%}<call>{{ id }}<arg>{% if tool_call['function']"
    "['arguments'] is string %}{{ tool_call['function']['arguments'] }}{% else %}{{ tool_call['function']['arguments'] | tojson }}"
    "{% endif %}</call>{%- endfor -%}{%- elif message['role'] == 'tool' -%}## Return of {{ message.get('tool_call_id', '') }}\n"
    "{{ render(message) }}{%- else -%}{{ render(message) }}{%- endif -%}<end>{%- endfor -%}",
    "available": "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = "
    "messages[1:] %}{%- else %}{%- set system_message = 'Today: ' + strftime_now('%Y') %}{%- if tools and documents %}"
    "{%- set system_message = system_message + ' both' %}{%- elif documents %}{%- set system_message = system_message + ' documents' %}"
    "{%- endif %}{%- if controls and 'citations' in controls %}{%- set system_message = system_message + ' cite' %}{%- endif %}"
    "{%- set loop_messages = messages %}{%- endif %}{{- '<|s|>system<|e|>' + system_message }}{%- if tools %}{{- tools | tojson(indent=4) }}"
    "{%- endif %}{%- if documents %}{%- for d in documents %}{{- 'Document ' + loop.index0 | string + '\n' + d['text'] }}"
    "{%- if not loop.last %}{{- '\n\n' }}{%- endif %}{%- endfor %}{%- endif %}{%- for m in loop_messages %}{{- m.role + m['content'] }}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|s|>assistant' }}{%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}"
    "{%- endif %}{%- endfor %}",
    "channels": "{%- macro kind(spec, required=true) -%}{%- if spec.enum is defined %}{{- '\"' ~ spec.enum | join('\" | \"') ~ '\"' }}"
    "{%- elif spec.type is sequence and spec.type is not string %}{{- spec.type | join(' | ') }}{%- else %}{{- spec.type or 'any' }}"
    "{%- endif %}{%- endmacro %}{%- set reasoning_effort = reasoning_effort | default('medium') %}{{- 'Reasoning: ' ~ reasoning_effort }}"
    "{%- set last = namespace(name=none) %}{%- for message in messages -%}{%- if message.role == 'assistant' %}{%- if 'content' in message "
    "and message.content is string and '<|channel|>' in message.content %}{{- raise_exception('channel tags') }}{%- endif %}"
    "{%- if 'tool_calls' in message %}{%- set call = message.tool_calls[0].function %}{%- if 'thinking' in message %}"
    "{{- '<|channel|>analysis' + message.thinking }}{%- endif %}{{- ' to=functions.' + call.name + ' json' + call.arguments | tojson }}"
    "{%- set last.name = call.name %}{%- elif loop.last and not add_generation_prompt %}{%- if 'thinking' in message %}{{- message.thinking }}"
    "{%- endif %}{{- '<|final|>' + message.content + '<|return|>' }}{%- else %}{{- '<|final|>' + message.content }}{%- endif %}"
    "{%- elif message.role == 'tool' -%}{%- if last.name is none %}{{- raise_exception('no call') }}{%- endif %}{{- last.name ~ ':' ~ "
    "message.content | tojson }}{%- elif message.role == 'user' -%}{{- kind({'type': 'string'}) ~ message.content }}{%- endif -%}{%- endfor -%}",
    "modes": "{# A comment. #}{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
    "{%- set reasoning_mode = '/think' if enable_thinking else '/no_think' -%}{%- if messages[0].role == 'system' -%}"
    "{%- set system_message = messages[0].content -%}{%- if '/no_think' in system_message -%}{%- set reasoning_mode = '/no_think' -%}"
    "{%- endif -%}{%- set custom = system_message.replace('/no_think', '').replace('/think', '').rstrip() -%}{%- endif -%}"
    "{%- set today = strftime_now('%d %B %Y') -%}{{- 'Mode: ' ~ reasoning_mode ~ (custom | default('')) -}}{%- if xml_tools or tools -%}"
    "{%- set ns = namespace(text='') -%}{%- for tool in (xml_tools or tools) -%}{%- set ns.text = ns.text ~ (tool | string) ~ '\n' -%}"
    "{%- endfor -%}{{- ns.text -}}{%- endif -%}{%- for message in messages -%}{%- set content = message.content if message.content is "
    "string else '' -%}{%- if message.role == 'user' -%}{{ '<u>' + content }}{%- elif message.role == 'assistant' -%}{%- generation -%}"
    "{%- if reasoning_mode == '/think' -%}{{ '<a>' + content.lstrip('\n') }}{%- else -%}{{ '<a><think>\n\n</think>\n' + content.lstrip('\n') }}"
    "{%- endif -%}{%- endgeneration -%}{%- endif -%}{%- endfor -%}",
    "filters": "{{ messages | rejectattr('role', 'in', ['system']) | map(attribute='content') | select('string') | join('|') }}"
    "{{ messages | groupby('role') | map('first') | list | length }}{{ (messages | first).content | default('', true) | string | length }}"
    "{{ (messages | last)['role'] | capitalize }}{% set counts = {} %}{% for m in messages %}{% set _ = m.get('name', 'x') %}{{ _ }}"
    "{{ '%s-%d' | format(m.role, loop.revindex) }}{{ loop.cycle('a', 'b') }}{{ loop.previtem.role if loop.previtem is defined }}"
    "{{ loop.nextitem is defined }}{% endfor %}{{ ['b', 'a'] | sort | unique | list }}{{ {'k': 1} | dictsort }}{{ 'a\\nb' | indent(2) }}"
    "{{ range(3) | batch(2) | list }}{{ [1, 2] | sum }}{{ none | default('d') }}{{ 3 // 2 }}{{ 2 ** 3 }}{{ 'x' * 2 }}{{ 1 if false }}",
    "none": "{{ tools is none }}{{ documents is none }}{{ add_bos_token is defined }}{{ pad_token }}"
    "{% for m in messages %}{{ m.content is none }}{{ m.content is defined }}{{ m.name }}{% endfor %}",
}

NAMED = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["tools"], "rag": TEMPLATES["documents"]}

CONFIG: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "unk_token": "<unk>",
    "pad_token": None,
    "add_bos_token": True,
}

_SYSTEM = {"role": "system", "content": "Be brief. "}
_USER = {"role": "user", "content": " Grüß Gott 😀 <b>&'\"\n"}
_SAID = {"role": "assistant", "content": "Hello"}
_CALL = {
    "type": "function",
    "id": "1",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, None]}},
}
_CALLED = {"role": "assistant", "content": None, "tool_calls": [_CALL, _CALL]}
_RESULT = {"role": "tool", "tool_call_id": "1", "name": "weather", "content": '{"rain": true}'}
_THOUGHT = {"role": "assistant", "content": "42", "reasoning_content": "6 * 7"}
_TOOL = {"type": "function", "function": {"name": "weather", "description": "é", "parameters": {"type": "object"}}}
_PREFILL = {"add_generation_prompt": False, "continue_final_message": True}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([_USER], {"add_generation_prompt": True}),
    "system": ([_SYSTEM, _USER, _SAID, _USER], {"add_generation_prompt": True}),
    "several system turns": ([_SYSTEM, _USER, _SYSTEM, _SAID], {}),
    "tools": ([_USER], {"tools": [_TOOL, _TOOL], "add_generation_prompt": True}),
    "no tools": ([_USER], {"tools": []}),
    "parallel calls": ([_USER, _CALLED], {"tools": [_TOOL]}),
    "results": ([_USER, _CALLED, _RESULT, _RESULT], {"tools": [_TOOL], "add_generation_prompt": True}),
    "prefill": ([_USER, {**_SAID, "content": "The answer is "}], _PREFILL),
    "prefill like the template": ([_USER, {**_SAID, "content": "<|im_start|>assistant"}], _PREFILL),
    "empty prefill": ([_USER, {**_SAID, "content": ""}], _PREFILL),
    "prefilled parts": ([_USER, {**_SAID, "content": [{"type": "text", "text": "a"}]}], _PREFILL),
    "empty content": ([{**_USER, "content": ""}, {**_SAID, "content": ""}], {}),
    "parts": ([{**_USER, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}),
    "thinking": ([_USER, _THOUGHT, {**_SAID, "content": "<think>\nx</think>\n\ny"}], {"enable_thinking": False}),
    "reasoning": ([_USER, {**_SAID, "reasoning": "z"}], {"enable_thinking": True}),
    "documents": ([_USER], {"documents": [{"title": "T", "text": "x"}], "date": "2020"}),
    "tokens of one's own": ([_USER], {"bos_token": "[B]"}),
}
"""Each with the options that it is rendered with."""
