// test_ptx.cpp: the machine that runs PTX (cuda_mock/ptx.h): what instructions give, how lanes part and meet, and that what a GPU
// would stop at or leave undefined is said

#include "check.h"
#include "cuda_mock/ptx.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace {

// a kernel of one pointer, in %out, with the thread's number in %t and the address of its word of the output in %own
std::string kernel(const std::string & body, const std::string & registers = "") {
    return ".version 9.0\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"
           ".visible .entry k(\n.param .u64 k_param_0\n)\n.maxntid 128, 1, 1\n{\n"
           ".reg .pred %p<8>;\n.reg .b16 %rs<8>;\n.reg .f32 %f<32>;\n.reg .b32 %r<32>;\n.reg .b64 %rd<16>;\n"
           ".reg .b32 %t;\n.reg .b64 %out, %own;\n" + registers +
           "ld.param.u64 %out, [k_param_0];\nmov.u32 %t, %tid.x;\nmul.wide.u32 %own, %t, 4;\nadd.s64 %own, %out, %own;\n" + body + "ret;\n}\n";
}

struct result {
    std::vector<uint32_t> out;
    std::string           error;
    ptx::counts           n;

    float number(int i) const {
        float x;
        memcpy(&x, &out[i], 4);
        return x;
    }
    bool says(const char * part) const {
        const bool found = error.find(part) != std::string::npos;
        if (!found) {
            fprintf(stderr, "expected \"%s\" in \"%s\"\n", part, error.c_str());
        }
        return found;
    }
};

result run(const std::string & text, int n_threads = 32, int shared_bytes = 1024, int n_blocks = 1) {
    ptx::library       library;
    ptx::device_memory memory;
    result             r;
    alignas(128) uint32_t out[256] = {};
    memory.add(out, sizeof(out));
    library.add(text);
    const void *        pointer = out;
    const void *        args[]  = { &pointer };
    const ptx::geometry g       = { { n_blocks, 1, 1 }, n_threads, (size_t) shared_bytes };
    try {
        r.n = ptx::run(library.find("k"), g, args, memory);
    } catch (const std::exception & e) {
        r.error = e.what();
    }
    r.out.assign(out, out + 256);
    return r;
}

// `body` leaves the thread's result in %r0
result of_threads(const std::string & body, int n_threads = 32) {
    return run(kernel(body + "st.global.u32 [%own], %r0;\n"), n_threads);
}

uint32_t one(const std::string & body) {
    const result r = of_threads(body);
    CHECK(r.error.empty());
    return r.out[0];
}

float one_float(const std::string & body) {
    const uint32_t bits = one(body + "mov.b32 %r0, %f0;\n");
    float          x;
    memcpy(&x, &bits, 4);
    return x;
}

void test_arithmetic() {
    CHECK(one("mov.u32 %r1, -7;\ndiv.s32 %r0, %r1, 2;\n") == (uint32_t) -3);
    CHECK(one("mov.u32 %r1, -7;\nshr.s32 %r0, %r1, 1;\n") == (uint32_t) -4);
    CHECK(one("mov.u32 %r1, -7;\nshr.u32 %r0, %r1, 40;\n") == 0);
    CHECK(one("mov.u32 %r1, 0x89abcdef;\nprmt.b32 %r0, %r1, 0, 0x4321;\n") == 0x0089abcd);
    CHECK(one("mov.u32 %r1, 0x80;\nprmt.b32 %r0, %r1, 0, 0x8888;\n") == 0xffffffff);
    CHECK(one("mov.u32 %r1, 5;\nmov.u32 %r2, -1;\nbfi.b32 %r0, %r1, %r2, 4, 8;\n") == 0xfffff05f);
    CHECK(one("mov.u32 %r1, 65536;\nmul.wide.s32 %rd0, %r1, %r1;\nshr.u64 %rd1, %rd0, 32;\ncvt.u32.u64 %r0, %rd1;\n") == 1);
    CHECK(one("mov.u32 %r1, 0x7fffffff;\nmad.lo.s32 %r0, %r1, 2, 3;\n") == 1);
    CHECK(one("mov.u32 %r1, 200;\ncvt.s32.s8 %r0, %r1;\n") == (uint32_t) -56);
    CHECK(one("mov.f32 %f1, 0fC0200000;\ncvt.rzi.s32.f32 %r0, %f1;\n") == (uint32_t) -2);        // -2.5
    CHECK(one("mov.f32 %f1, 0f7F800000;\ncvt.rzi.s32.f32 %r0, %f1;\n") == 0x7fffffff);           // infinity
    CHECK(one("mov.f32 %f1, 0f3F800800;\ncvt.rn.f16.f32 %rs0, %f1;\nmov.b32 %r0, {%rs0, %rs0};\n") == 0x3c003c00); // halfway, to even
    CHECK(one_float("mov.f32 %f1, 0f40400000;\nmov.f32 %f2, 0fBF800000;\ncopysign.f32 %f0, %f2, %f1;\n") == -3.0f);
    CHECK(one_float("mov.f32 %f1, 0f7FC00000;\nmov.f32 %f2, 0f3F800000;\nmax.f32 %f0, %f1, %f2;\n") == 1.0f);
    CHECK(std::isnan(one_float("mov.f32 %f1, 0f7FC00000;\nmov.f32 %f2, 0f3F800000;\nmin.NaN.f32 %f0, %f1, %f2;\n")));
    CHECK(one_float("mov.f32 %f1, 0fC3000000;\nex2.approx.ftz.f32 %f0, %f1;\n") == 0.0f); // 2^-128
    CHECK(one("mov.f32 %f1, 0f7FC00000;\nsetp.lt.f32 %p0, %f1, %f1;\nsetp.ltu.f32 %p1, %f1, %f1;\nselp.u32 %r1, 1, 0, %p0;\nselp.u32 %r2, 2, 0, %p1;\nadd.s32 %r0, %r1, %r2;\n") == 2);
    CHECK(of_threads("mov.u32 %r0, %warpid;\n").says("a register that is not known: %warpid"));
    CHECK(one("mov.u16 %rs0, 300;\nmov.u32 %r1, 7;\nmul.wide.u16 %r0, %rs0, %rs0;\nadd.s32 %r0, %r0, %r1;\n") == 90007);
    CHECK(one("mov.b64 %rd0, {%t, 5};\nshr.u64 %rd0, %rd0, 32;\ncvt.u32.u64 %r0, %rd0;\n") == 5);
    CHECK(one("mov.f32 %f1, 0f80000000;\nmov.f32 %f2, 0f00000000;\nmax.f32 %f3, %f1, %f2;\nmov.b32 %r0, %f3;\n") == 0);
    CHECK(of_threads("fma.rn.sat.f32 %f0, %f1, %f2, %f3;\n").says("an instruction that is not known: fma.rn.sat.f32"));
    CHECK(of_threads("ex2.approx.f32 %f0, %f1;\n").says("an instruction that is not known: ex2.approx.f32"));
    CHECK(of_threads("cvt.rn.sat.f32.f32 %f0, %f1;\n").says("an instruction that is not known: cvt.rn.sat.f32.f32"));
    CHECK(of_threads("add.s32 %r0, %r1;\n").says("operands of another number: add.s32 %r0, %r1"));
    CHECK(of_threads("setp.lt.s32 %p0|%p1, %r1, %r2;\n").says("operands of another number"));
    CHECK(of_threads("dp4a.u32.u32 %r0, %r1, %r2, %r3;\n").says("an instruction that is not known: dp4a.u32.u32"));
}

void test_branches() {
    // each thread turns as often as its number says
    const result loops = of_threads("mov.u32 %r0, 0;\nmov.u32 %r1, %t;\n$again:\nsetp.eq.s32 %p0, %r1, 0;\n@%p0 bra $done;\n"
                                    "add.s32 %r0, %r0, 3;\nadd.s32 %r1, %r1, -1;\nbra.uni $again;\n$done:\n", 64);
    CHECK(loops.error.empty());
    for (int t = 0; t < 64; t++) {
        CHECK(loops.out[t] == 3u * t);
    }
    // lanes that went apart shuffle once they are together again; some had been there before
    const result meets = of_threads("and.b32 %r1, %t, 1;\nsetp.eq.s32 %p0, %r1, 1;\nmov.u32 %r2, 10;\n@%p0 bra $odd;\nmov.u32 %r2, 20;\n$odd:\n"
                                    "shfl.sync.bfly.b32 %r0|%p1, %r2, 1, 31, -1;\n");
    CHECK(meets.error.empty() && meets.out[0] == 10 && meets.out[1] == 20 && meets.out[30] == 10);
    // the place where they meet stands before the place where some come from
    const result back = of_threads("mov.u32 %r2, 0;\nsetp.gt.u32 %p0, %t, 7;\nbra.uni $start;\n$meet:\nshfl.sync.idx.b32 %r0|%p1, %r2, 9, 31, -1;\n"
                                   "bra.uni $end;\n$start:\n@!%p0 bra $meet;\nmov.u32 %r2, 5;\nbra.uni $meet;\n$end:\n");
    CHECK(back.error.empty() && back.out[0] == 5 && back.out[31] == 5);
    CHECK(of_threads("setp.gt.u32 %p0, %t, 7;\n@%p0 bra $skip;\nshfl.sync.idx.b32 %r0|%p1, %t, 0, 31, -1;\n$skip:\n")
              .says("a part of the warp comes here, and the other one elsewhere or to its end"));
    CHECK(of_threads("setp.gt.u32 %p0, %t, 7;\n@%p0 shfl.sync.idx.b32 %r0|%p1, %t, 0, 31, -1;\n").says("under a condition that not all lanes fulfil"));
    CHECK(of_threads("shfl.sync.idx.b32 %r0|%p1, %t, 0, 31, 255;\n").says("not for all lanes of the warp"));
    CHECK(run(kernel("bar.sync 1, 64;\n"), 128).says("another barrier than the block's"));
    CHECK(run(kernel("setp.gt.u32 %p0, %t, 31;\n@%p0 bra $other;\nbar.sync 0;\nbra.uni $end;\n$other:\nbar.sync 0;\n$end:\n"), 64)
              .says("a barrier while other warps are at another one"));
    CHECK(run(kernel("setp.gt.u32 %p0, %t, 31;\n@%p0 bra $skip;\nbar.sync 0;\n$skip:\n"), 64).says("a barrier that other warps ended without"));
    CHECK(run(kernel("setp.gt.u32 %p0, %t, 7;\n@%p0 bra $skip;\nbar.sync 0;\n$skip:\n"), 32).says("a part of the warp comes here"));
}

void test_warp() {
    const result vote = of_threads("setp.gt.u32 %p0, %t, 27;\nvote.sync.ballot.b32 %r0, %p0, -1;\n");
    CHECK(vote.out[0] == 0xf0000000 && vote.out[31] == 0xf0000000);
    const result down = of_threads("shfl.sync.down.b32 %r0|%p0, %t, 4, 31, -1;\n");
    CHECK(down.out[0] == 4 && down.out[27] == 31 && down.out[28] == 28);
    const result up = of_threads("shfl.sync.up.b32 %r0|%p0, %t, 4, 0, -1;\n");
    CHECK(up.out[3] == 3 && up.out[4] == 0 && up.out[31] == 27);

    // elements of an 8 x 8 matrix are 8 row + column; lane l has columns 2 (l % 4), + 1 of row l / 4
    const std::string number = "shl.b32 %r1, %t, 1;\nadd.s32 %r2, %r1, 1;\ncvt.u16.u32 %rs0, %r1;\ncvt.u16.u32 %rs1, %r2;\nmov.b32 %r3, {%rs0, %rs1};\n";
    const result transposed  = of_threads(number + "movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r3;\n");
    for (int l = 0; l < 32; l++) {
        const uint32_t row = l / 4, column = l % 4 * 2;
        CHECK(transposed.out[l] == ((8 * column + row) | (8 * (column + 1) + row) << 16));
    }
    // four matrices, one behind the other in shared memory; a lane names the row of 16 bytes of its number
    for (const char * how : { "", ".trans" }) {
        const result loaded = run(kernel(number + "shl.b32 %r4, %t, 2;\nmov.u32 %r5, memory;\nadd.s32 %r4, %r5, %r4;\nst.shared.u32 [%r4], %r3;\n"
                                         "st.shared.u32 [%r4+128], %r3;\nst.shared.u32 [%r4+256], %r3;\nst.shared.u32 [%r4+384], %t;\nbar.sync 0;\n"
                                         "shl.b32 %r6, %t, 4;\nadd.s32 %r6, %r5, %r6;\n"
                                         "ldmatrix.sync.aligned.m8n8.x4" + std::string(how) + ".shared.b16 {%r10, %r11, %r12, %r13}, [%r6];\n"
                                         "st.global.u32 [%own], %r12;\nst.global.u32 [%own+512], %r13;\n"));
        CHECK(loaded.error.empty() && loaded.n.shared_turns == loaded.n.shared_least);
        for (int l = 0; l < 32; l++) {
            const uint32_t row = l / 4, column = l % 4 * 2;
            CHECK(loaded.out[l] == (*how != 0 ? ((8 * column + row) | (8 * (column + 1) + row) << 16) : ((8 * row + column) | (8 * row + column + 1) << 16)));
        }
        CHECK(*how != 0 || loaded.out[128 + 5] == 5);
    }
}

// A[i][k] = i + 1 where k = i % depth, B[k][j] = k + 16 j: their product by hand
void test_mma() {
    for (const int depth : { 8, 16 }) {
        std::string load;
        const auto  element = [&](const char * to, int place, const std::string & row, const std::string & column, bool a) {
            // f16 of the number: 1024 + n has n in its last bits
            load += "add.s32 %r20, " + row + ", 0;\nadd.s32 %r21, " + column + ", 0;\n";
            if (a) {
                load += "rem.s32 %r22, %r20, " + std::to_string(depth) + ";\nsetp.eq.s32 %p0, %r22, %r21;\nadd.s32 %r23, %r20, 1;\nselp.b32 %r24, %r23, 0, %p0;\n";
            } else {
                load += "mad.lo.s32 %r24, %r21, 16, %r20;\n";
            }
            load += "cvt.rn.f32.s32 %f20, %r24;\ncvt.rn.f16.f32 %rs" + std::to_string(place % 2) + ", %f20;\n";
            if (place % 2 == 1) {
                load += std::string("mov.b32 ") + to + std::to_string(place / 2) + ", {%rs0, %rs1};\n";
            }
        };
        load += "shr.u32 %r16, %t, 2;\nand.b32 %r17, %t, 3;\nshl.b32 %r17, %r17, 1;\nadd.s32 %r18, %r17, 1;\nadd.s32 %r19, %r16, 8;\n"
                "add.s32 %r26, %r17, 8;\nadd.s32 %r27, %r18, 8;\n";
        int place = 0;
        for (const auto & [row, first, second] : { std::tuple{ "%r16", "%r17", "%r18" }, { "%r19", "%r17", "%r18" }, { "%r16", "%r26", "%r27" }, { "%r19", "%r26", "%r27" } }) {
            if (place < depth / 2) {
                element("%r", place++, row, first, true);
                element("%r", place++, row, second, true);
            }
        }
        place = 0; // of B in %r8 and %r9; the row is along the lane's quarter
        for (const auto & [first, second] : { std::pair{ "%r17", "%r18" }, { "%r26", "%r27" } }) {
            if (place < depth / 4) {
                element("%r", 16 + place++, first, "%r16", false);
                element("%r", 16 + place++, second, "%r16", false);
            }
        }
        load += "mov.f32 %f0, 0f3F000000;\n"; // 0.5
        const std::string shape = depth == 16 ? "m16n8k16" : "m16n8k8", a = depth == 16 ? "{%r0, %r1, %r2, %r3}" : "{%r0, %r1}", b = depth == 16 ? "{%r8, %r9}" : "{%r8}";
        const result r = run(kernel(load + "mma.sync.aligned." + shape + ".row.col.f32.f16.f16.f32 {%f4, %f5, %f6, %f7}, " + a + ", " + b +
                                    ", {%f0, %f0, %f0, %f0};\nst.global.f32 [%own], %f4;\nst.global.f32 [%own+128], %f5;\nst.global.f32 [%own+256], %f6;\nst.global.f32 [%own+384], %f7;\n"));
        CHECK(r.error.empty());
        for (int l = 0; l < 32; l++) {
            for (int e = 0; e < 4; e++) {
                const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
                CHECK(r.number(32 * e + l) == (float) ((row + 1) * (row % depth + 16 * column)) + 0.5f);
            }
        }
    }
    // what lies 24 bits below the largest is cut off
    const std::string ones = "mov.u32 %r0, 0x3c003c00;\nmov.u32 %r8, %r0;\n"; // all ones: products of one, eight of them
    const result cut = run(kernel(ones + "mov.f32 %f0, 0f4CC00000;\n" // 1.5 x 2^26, whose last bit is 8
                                  "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f4, %f5, %f6, %f7}, {%r0, %r0}, {%r8}, {%f0, %f0, %f0, %f0};\nst.global.f32 [%own], %f4;\n"));
    CHECK(cut.number(0) == 1.5f * 67108864.0f);
}

void test_memory() {
    CHECK(of_threads("ld.global.u32 %r0, [%own+2];\n").says("not a multiple of 4"));
    CHECK(of_threads("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%own];\n").says("not a multiple of 16"));
    CHECK(of_threads("ld.global.u32 %r0, [%own+1024];\n").says("memory that is not the device's"));
    CHECK(of_threads("ld.global.u32 %r0, [%out+-4];\n").says("memory that is not the device's"));
    CHECK(run(kernel("st.global.u32 [%out], %t;\n")).says("is written by two threads"));
    CHECK(run(kernel("st.global.u32 [%own], %t;\nbar.sync 0;\nld.global.u32 %r0, [%out];\n")).says("is read by another thread than wrote it"));
    CHECK(run(kernel("ld.param.u64 %rd0, [k_param_0+8];\n")).says("beyond the parameters"));

    const std::string own = "mov.u32 %r1, memory;\nshl.b32 %r2, %t, 2;\nadd.s32 %r3, %r1, %r2;\n";
    CHECK(run(kernel(own + "ld.shared.u32 %r0, [%r3];\n")).says("is read before anything was written there"));
    CHECK(run(kernel(own + "st.shared.u32 [%r3+1000], %t;\n")).says("beyond the 1024 bytes of shared memory"));
    CHECK(run(kernel(own + "st.shared.u32 [%r1], %t;\n")).says("is written by two threads without a barrier between them"));
    CHECK(run(kernel(own + "st.shared.u32 [%r3], %t;\nld.shared.u32 %r0, [%r1];\n")).says("is read without a barrier after it was written, by thread 0"));
    const std::string shared_store = own + "st.shared.u32 [%r3], %t;\nbar.sync 0;\n";
    const result      right        = run(kernel(shared_store + "ld.shared.u32 %r0, [%r1+28];\nst.global.u32 [%own], %r0;\n"), 128);
    CHECK(right.error.empty() && right.out[100] == 7 && right.n.shared_turns == right.n.shared_least);
    // through a generic address, and what a block leaves is not the next one's
    const result generic = run(kernel(shared_store + "cvt.u64.u32 %rd0, %r3;\ncvta.shared.u64 %rd1, %rd0;\nld.u32 %r0, [%rd1];\nst.global.u32 [%own], %r0;\n"));
    CHECK(generic.error.empty() && generic.out[9] == 9);
    CHECK(run(kernel("mov.u32 %r5, %ctaid.x;\nsetp.eq.s32 %p0, %r5, 1;\n@%p0 bra $second;\n" + shared_store + "$second:\nmov.u32 %r1, memory;\nld.shared.u32 %r0, [%r1];\n"), 32, 1024, 2)
              .says("is read before anything was written there"));
    // lanes 128 bytes apart ask one bank
    const result conflict = run(kernel("mov.u32 %r1, memory;\nshl.b32 %r2, %t, 7;\nadd.s32 %r3, %r1, %r2;\nst.shared.u32 [%r3], %t;\n"), 32, 4096);
    CHECK(conflict.error.empty() && conflict.n.shared_turns == 32 && conflict.n.shared_least == 1);
    const result sectors = run(kernel("mul.wide.u32 %rd0, %t, 32;\nadd.s64 %rd0, %out, %rd0;\nld.global.u32 %r0, [%rd0];\nld.global.u32 %r0, [%own];\n"));
    CHECK(sectors.error.empty() && sectors.n.global_sectors == 32 + 4 && sectors.n.global_bytes == 256 && sectors.n.global_requests == 2);
    // a thread's own memory
    const result local = run(kernel("add.u64 %rd0, %SPL, 0;\nst.local.u32 [%rd0+4], %t;\nld.local.u32 %r0, [%rd0+4];\nst.global.u32 [%own], %r0;\n",
                                    ".local .align 4 .b8 __local_depot0[8];\n.reg .b64 %SPL;\nmov.u64 %SPL, __local_depot0;\n"));
    CHECK(local.error.empty() && local.out[17] == 17);
}

} // namespace

int main() {
    test_arithmetic();
    test_branches();
    test_warp();
    test_mma();
    test_memory();
    return check_report("test-ptx");
}
