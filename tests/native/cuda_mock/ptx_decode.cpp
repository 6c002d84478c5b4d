// ptx_decode.cpp: from PTX text to instructions

#include "ptx_impl.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <stdexcept>

namespace ptx {

namespace {

std::string without_comments(const std::string & text) {
    std::string out;
    for (size_t i = 0; i < text.size(); i++) {
        if (text.compare(i, 2, "//") == 0) {
            i = std::min(text.find('\n', i), text.size());
        } else if (text.compare(i, 2, "/*") == 0) {
            i = text.find("*/", i) + 1;
            continue;
        }
        out += i < text.size() && !isspace((unsigned char) text[i]) ? text[i] : ' ';
    }
    return out;
}

std::string trimmed(const std::string & s) {
    const size_t first = s.find_first_not_of(' ');
    return first == std::string::npos ? "" : s.substr(first, s.find_last_not_of(' ') - first + 1);
}

// at commas outside of brackets
std::vector<std::string> split(const std::string & s) {
    std::vector<std::string> parts;
    int                      depth = 0;
    size_t                   begin = 0;
    for (size_t i = 0; i <= s.size(); i++) {
        if (i == s.size() || (s[i] == ',' && depth == 0)) {
            const std::string part = trimmed(s.substr(begin, i - begin));
            if (!part.empty()) {
                parts.push_back(part);
            }
            begin = i + 1;
        } else {
            depth += s[i] == '{' || s[i] == '[';
            depth -= s[i] == '}' || s[i] == ']';
        }
    }
    return parts;
}

[[noreturn]] void refuse(const std::string & what, const std::string & statement) {
    throw std::runtime_error(what + ": " + statement);
}

bool ends_with(const std::string & s, const std::string & end) {
    return s.size() >= end.size() && s.compare(s.size() - end.size(), end.size(), end) == 0;
}

class decoder {
  public:
    decoder(const std::string & name, const std::string & text) : f(new function()) {
        f->name = name;
        for (int & place : f->specials) {
            place = -1;
        }
        const size_t body = text.find('{');
        header(text.substr(0, body));
        statements(text.substr(body + 1));
        for (const auto & [index, label] : branches) {
            const auto found = labels.find(label);
            if (found == labels.end()) {
                refuse("no such label", label);
            }
            f->code[index].target = found->second;
        }
        // behind the static one
        const size_t dynamic = (f->static_shared + 15) / 16 * 16;
        f->static_shared     = dynamic;
        for (const size_t index : dynamic_shared) {
            f->constants[index].value = dynamic;
        }
    }

    std::unique_ptr<function> f;

  private:
    struct reg {
        int  place;
        bool wide;
    };

    int allocate(bool wide) {
        const int place = (int) f->register_bytes;
        f->register_bytes += wide ? 256 : 128;
        return place;
    }

    // .entry name(.param .align 8 .b8 x[104]) .maxntid 128, 1, 1
    void header(const std::string & text) {
        const size_t open = text.find('('), close = text.find(')');
        for (const std::string & p : split(text.substr(open + 1, close - open - 1))) {
            size_t       size  = 0, align = 0;
            const size_t array = p.find('[');
            if (array != std::string::npos) {
                size           = strtoul(p.c_str() + array + 1, nullptr, 10);
                const size_t a = p.find(".align");
                align          = a == std::string::npos ? 1 : strtoul(p.c_str() + a + 6, nullptr, 10);
            } else {
                size = align = p.find("64 ") != std::string::npos ? 8 : 4;
            }
            const size_t offset       = (f->parameter_bytes + align - 1) / align * align;
            const size_t begin        = p.rfind(' ', array == std::string::npos ? p.size() : array) + 1;
            parameters[p.substr(begin, array == std::string::npos ? std::string::npos : array - begin)] = offset;
            f->parameter_offsets.push_back(offset);
            f->parameter_sizes.push_back(size);
            f->parameter_bytes = offset + size;
        }
        const size_t threads = text.find(".maxntid");
        if (threads != std::string::npos) {
            f->max_threads = atoi(text.c_str() + threads + 8);
        }
    }

    void statements(const std::string & body) {
        std::string statement;
        int         depth = 0; // of braces inside a statement
        for (const char c : body) {
            const bool starts = trimmed(statement).empty();
            if (starts && (c == '{' || c == '}')) {
                continue; // a scope; names in ours are unique
            }
            depth += c == '{';
            depth -= c == '}';
            if (c == ';' && depth == 0) {
                one(trimmed(statement));
                statement.clear();
            } else if (c == ':' && depth == 0) {
                labels[trimmed(statement)] = (int) f->code.size();
                statement.clear();
            } else {
                statement += c;
            }
        }
    }

    // .reg .b32 %r<155>    .reg .pred p, q
    void registers(const std::string & s) {
        const size_t type = s.find_first_not_of(' ', 4);
        const size_t end  = s.find(' ', type);
        const bool   wide = ends_with(s.substr(type, end - type), "64");
        for (const std::string & name : split(s.substr(end))) {
            const size_t range = name.find('<');
            if (range == std::string::npos) {
                regs[name] = { allocate(wide), wide };
                continue;
            }
            const int n = atoi(name.c_str() + range + 1);
            for (int i = 0; i < n; i++) {
                regs[name.substr(0, range) + std::to_string(i)] = { allocate(wide), wide };
            }
        }
    }

    // .shared .align 16 .b8 x[64]
    void array(const std::string & s, size_t & bytes, std::map<std::string, size_t> & symbols) {
        const size_t open = s.find('['), begin = s.rfind(' ', open) + 1;
        const size_t a     = s.find(".align");
        const size_t align = a == std::string::npos ? 16 : strtoul(s.c_str() + a + 6, nullptr, 10);
        const size_t unit  = s.find(".b8") != std::string::npos ? 1 : 0;
        if (open == std::string::npos || unit == 0) {
            refuse("an array of another type", s);
        }
        bytes                                 = (bytes + align - 1) / align * align;
        symbols[s.substr(begin, open - begin)] = bytes;
        bytes += strtoul(s.c_str() + open + 1, nullptr, 10);
    }

    void one(const std::string & s) {
        if (s.empty() || s.rfind(".pragma", 0) == 0 || s.rfind(".loc", 0) == 0) {
            if (s.rfind(".local", 0) == 0) {
                array(s, f->local_bytes, locals);
            }
            return;
        }
        if (s.rfind(".reg", 0) == 0) {
            return registers(s);
        }
        if (s.rfind(".shared", 0) == 0) {
            return array(s, f->static_shared, shared);
        }
        if (s[0] == '.') {
            refuse("a directive that is not known", s);
        }
        code(s);
    }

    void code(const std::string & s) {
        instruction i;
        i.line       = (int) f->text.size();
        size_t begin = 0;
        f->text.push_back(s);
        if (s[0] == '@') {
            i.guard_not      = s[1] == '!';
            const size_t end = s.find(' ');
            i.guard          = regs.at(s.substr(i.guard_not ? 2 : 1, end - (i.guard_not ? 2 : 1))).place;
            begin            = s.find_first_not_of(' ', end);
        }
        const size_t      end    = std::min(s.find(' ', begin), s.size());
        const std::string opcode = s.substr(begin, end - begin);
        i.run                    = handler_for(opcode, i.what);
        const auto operands      = split(s.substr(end));
        if (i.what == kind::barrier && operands != std::vector<std::string>{ "0" }) {
            refuse("another barrier than the block's", s);
        }
        if (i.what == kind::branch) {
            branches.push_back({ f->code.size(), operands.at(0) });
        } else {
            const bool stores = opcode.rfind("st.", 0) == 0 || i.what == kind::barrier || i.what == kind::exit;
            for (size_t o = 0; o < operands.size(); o++) {
                operand(i, opcode, operands[o], o == 0 && !stores);
            }
            check_operands(i, opcode);
        }
        f->code.push_back(i);
    }

    // as many as the handlers take
    void check_operands(const instruction & i, const std::string & opcode) {
        struct arity {
            const char * start;
            int          n_d, n_s;
        };
        static const arity all[] = {
            { "cvt.rn.f16x2.", 1, 2 }, { "cvt", 1, 1 },  { "neg.", 1, 1 }, { "abs.", 1, 1 },       { "not.", 1, 1 },     { "rcp.", 1, 1 },
            { "ex2.", 1, 1 },          { "lg2.", 1, 1 }, { "sqrt.", 1, 1 }, { "popc.", 1, 1 },     { "mad.", 1, 3 },     { "fma.", 1, 3 },
            { "selp.", 1, 3 },         { "prmt.", 1, 3 }, { "bfi.", 1, 4 }, { "movmatrix.", 1, 1 }, { "ldmatrix.", 4, 1 }, { "bar.", 0, 1 },
            { "mma.sync.aligned.m16n8k16", 4, 10 },       { "mma.", 4, 7 }, { "ret", 0, 0 },        { "exit", 0, 0 },     { "", 1, 2 },
        };
        const auto starts = [&](const char * text) { return opcode.rfind(text, 0) == 0; };
        const auto has    = [&](const char * text) { return opcode.find(text) != std::string::npos; };
        const int  parts  = has(".v2.") ? 2 : has(".v4.") ? 4 : 1;
        bool       right;
        if (starts("ld.")) {
            right = i.n_d == parts && i.n_s == 1;
        } else if (starts("st.")) {
            right = i.n_d == 0 && i.n_s == 1 + parts;
        } else if (starts("mov.")) {
            right = (i.n_d == 1 && (i.n_s == 1 || i.n_s == 2)) || (i.n_d == 2 && i.n_s == 1);
        } else if (starts("shfl.")) {
            right = (i.n_d == 1 || i.n_d == 2) && i.n_s == 4;
        } else if (starts("setp.") && (has(".and.") || has(".or."))) {
            right = i.n_d == 1 && i.n_s == 3;
        } else {
            const auto & expected = *std::find_if(std::begin(all), std::end(all), [&](const arity & a) { return starts(a.start); });
            right                 = i.n_d == expected.n_d && i.n_s == expected.n_s;
        }
        if (!right) {
            refuse("operands of another number", f->text[i.line]);
        }
    }

    void operand(instruction & i, const std::string & opcode, const std::string & o, bool destination) {
        if (o[0] == '{') {
            const bool halves = opcode == "mov.b64"; // its parts have 32 bits
            for (const std::string & part : split(o.substr(1, o.size() - 2))) {
                operand(i, halves ? "mov.b32" : opcode, part, destination);
            }
            return;
        }
        const size_t bar = o.find('|');
        if (bar != std::string::npos) {
            operand(i, opcode, o.substr(0, bar), destination);
            operand(i, opcode, o.substr(bar + 1), destination);
            return;
        }
        if (o[0] == '[') {
            const size_t      sign = o.find_first_of("+-");
            const std::string base = o.substr(1, std::min(sign, o.size() - 1) - 1);
            i.offset               = sign == std::string::npos ? 0 : strtoll(o.c_str() + sign + (o[sign] == '+'), nullptr, 0);
            const auto found       = regs.find(base);
            i.wide                 = found == regs.end() || found->second.wide;
            put(i, found == regs.end() ? value(base, true) : found->second.place, false);
            return;
        }
        const auto found = regs.find(o);
        if (found != regs.end() && found->second.wide) {
            check_width(i, opcode, destination);
        }
        put(i, found != regs.end() ? found->second.place : value(o, wide(opcode, i.n_s)), destination);
    }

    // Registers may be wider than what is loaded, stored and converted.
    void check_width(instruction & i, const std::string & opcode, bool destination) {
        const bool   converts = opcode.rfind("cvt.", 0) == 0;
        const size_t last     = opcode.rfind('.');
        if (ends_with(converts && destination ? opcode.substr(0, last) : opcode, "64")) {
            return;
        }
        if (opcode.rfind("ld.", 0) == 0) {
            i.widens = true;
        } else if (opcode.rfind("st.", 0) == 0 || converts) {
            refuse("a register that is wider than the type", f->text[i.line]);
        }
    }

    void put(instruction & i, int place, bool destination) {
        if ((destination ? i.n_d == 4 : i.n_s == 12)) {
            refuse("too many operands", f->text[i.line]);
        }
        (destination ? i.d[i.n_d++] : i.s[i.n_s++]) = place;
    }

    // whether an immediate in that place of an instruction is of 64 bits
    static bool wide(const std::string & opcode, int index) {
        const bool amount = (opcode.rfind("shl", 0) == 0 || opcode.rfind("shr", 0) == 0) && index == 1;
        return (ends_with(opcode, "64") && !amount) || (opcode.rfind("mad.wide", 0) == 0 && !ends_with(opcode, "16") && index == 2);
    }

    int special_of(const std::string & name) {
        static const char * const names[N_SPECIAL] = { "%tid.x",  "%laneid",   "%ctaid.x",  "%ctaid.y", "%ctaid.z",
                                                       "%ntid.x", "%nctaid.x", "%nctaid.y", "%nctaid.z" };
        for (int i = 0; i < N_SPECIAL; i++) {
            if (name == names[i]) {
                if (f->specials[i] < 0) {
                    f->specials[i] = allocate(false);
                }
                return f->specials[i];
            }
        }
        refuse("a register that is not known", name);
    }

    int value(const std::string & o, bool is_wide) {
        if (o[0] == '%') {
            return special_of(o);
        }
        const auto known = places.find({ o, is_wide });
        if (known != places.end()) {
            return known->second;
        }
        const int place      = allocate(is_wide);
        places[{ o, is_wide }] = place;
        constant c           = { place, is_wide, 0 };
        if (isdigit((unsigned char) o[0]) || o[0] == '-') {
            const bool is_float = o.size() > 2 && o[0] == '0' && (o[1] == 'f' || o[1] == 'd');
            c.value             = is_float ? strtoull(o.c_str() + 2, nullptr, 16) :
                                  o[0] == '-' ? (uint64_t) strtoll(o.c_str(), nullptr, 0) :
                                                strtoull(o.c_str(), nullptr, 0);
        } else if (parameters.count(o) != 0) {
            c.value = parameters.at(o);
            f->of_parameters.push_back(c);
            return place;
        } else if (shared.count(o) != 0) {
            c.value = shared.at(o);
        } else if (locals.count(o) != 0) {
            c.value = locals.at(o);
        } else if (o == "memory") { // extern .shared, in launch.cuh
            dynamic_shared.push_back(f->constants.size());
        } else {
            refuse("a symbol that is not known", o);
        }
        f->constants.push_back(c);
        return place;
    }

    std::map<std::string, reg>                  regs;
    std::map<std::string, size_t>               parameters, shared, locals;
    std::map<std::pair<std::string, bool>, int> places;
    std::map<std::string, int>                  labels;
    std::vector<std::pair<size_t, std::string>> branches;
    std::vector<size_t>                         dynamic_shared; // constants with its address
};

} // namespace

library::library()  = default;
library::~library() = default;

void library::add(const std::string & given) {
    const std::string text = without_comments(given);
    for (size_t at = text.find(".entry "); at != std::string::npos;) {
        const size_t next  = text.find(".entry ", at + 1);
        const size_t begin = text.find_first_not_of(' ', at + 7);
        texts[trimmed(text.substr(begin, text.find('(', begin) - begin))] = text.substr(begin, next == std::string::npos ? next : next - begin);
        at = next;
    }
}

const function & library::find(const std::string & name) {
    auto & found = functions[name];
    if (found == nullptr) {
        const auto text = texts.find(name);
        if (text == texts.end()) {
            throw std::runtime_error("no kernel " + name);
        }
        // up to the brace that ends it; what follows belongs to the next
        const std::string & t = text->second;
        int                 depth = 0;
        size_t              end   = t.find('{');
        do {
            depth += t[end] == '{';
            depth -= t[end] == '}';
            end++;
        } while (depth > 0 && end < t.size());
        found = std::move(decoder(name, t.substr(0, end)).f);
    }
    return *found;
}

size_t parameter_bytes(const function & kernel) {
    return kernel.parameter_bytes;
}

size_t n_parameters(const function & kernel) {
    return kernel.parameter_sizes.size();
}

int max_threads(const function & kernel) {
    return kernel.max_threads;
}

} // namespace ptx
